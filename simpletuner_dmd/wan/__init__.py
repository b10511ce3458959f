"""Everything that knows it is Wan.

The networks are the stock diffusers and transformers classes, attached to, never patched.
"""
