"""The adapters that come with moe_lens, one family a file."""

from __future__ import annotations

from importlib.metadata import entry_points

from moe_lens_hooks.adapter import Adapter
from moe_lens_hooks.adapters.autoep import AutoEP
from moe_lens_hooks.adapters.capacity_slots import CapacitySlots
from moe_lens_hooks.adapters.deepspeed import DeepSpeed
from moe_lens_hooks.adapters.dense_scores import DenseScores
from moe_lens_hooks.adapters.fused_experts import FusedExperts
from moe_lens_hooks.adapters.gshard import GShard
from moe_lens_hooks.adapters.hash_router import HashRouter
from moe_lens_hooks.adapters.identity_experts import IdentityExperts
from moe_lens_hooks.adapters.inline import Inline
from moe_lens_hooks.adapters.inner_logits import InnerLogits
from moe_lens_hooks.adapters.megatron import Megatron
from moe_lens_hooks.adapters.modality import Modality
from moe_lens_hooks.adapters.nllb import Nllb
from moe_lens_hooks.adapters.product_keys import ProductKeys
from moe_lens_hooks.adapters.skip_class import SkipClass
from moe_lens_hooks.adapters.sorted_dispatch import SortedDispatch
from moe_lens_hooks.adapters.switch import Switch
from moe_lens_hooks.adapters.task_experts import TaskExperts
from moe_lens_hooks.adapters.torchtitan import Torchtitan


def all_adapters() -> list[Adapter]:
    """Ours and those that installed packages registered, in the order they are asked."""
    theirs = [point.load()() for point in entry_points(group="moe_lens.adapters")]
    families = [
        *(Switch(), Nllb(), DenseScores(), SortedDispatch(), ProductKeys(), IdentityExperts()),
        *(SkipClass(), HashRouter(), Modality(), InnerLogits(), TaskExperts()),
        *(Torchtitan(), Megatron(), DeepSpeed(), AutoEP(), GShard()),
    ]
    # The general ones come last: they know nothing of what is special in a family.
    return [*theirs, *families, CapacitySlots(), FusedExperts(), Inline()]
