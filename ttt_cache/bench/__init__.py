"""`ttt-cache bench`: what one attention core costs, stock, patched and as others would do it."""
