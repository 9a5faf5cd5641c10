"""The networks' blocks with the fast backend's arithmetic; start reading at
:mod:`sdconv.fast.blocks`."""
