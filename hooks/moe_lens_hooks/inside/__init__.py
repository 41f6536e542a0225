"""Routing that no module hands over: seen inside a block's forward, and proved before it is used.

`bank` says what the experts of a block are and how one of them is put out of action, `watch` notes
the tensors that may be ids or weights while the block runs, `state` puts a block back as it was,
`confirm` finds out by ablation which of them are the routing, `layer` makes it a layer.
"""
