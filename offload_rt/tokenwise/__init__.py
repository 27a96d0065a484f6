"""Layers that run by chunks of tokens, so that of each chunk activations are kept, swapped or computed again.

`layer` is what takes a layer's place; `tiles` one pass of it, forward and backward; `attention` finds the call at which
a layer is cut, `slicing` what of its arguments goes by tokens; `saved` holds what autograd saves; `locality` finds
layers that cannot be cut.
"""
