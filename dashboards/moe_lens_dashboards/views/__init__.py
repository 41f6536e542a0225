"""One page a file: a function `page(run)`. `pages.py` lists them."""
