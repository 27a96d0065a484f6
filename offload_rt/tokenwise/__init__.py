"""Layers that run by chunks of tokens, so that of each chunk activations are kept, swapped or computed again.

`layer` is what takes a layer's place; `tiled_pass` one pass of it, made of `forward`, `backward` and `replays` over
`tiles`; `first_products` what a replay leaves out; `attention` finds the call at which a layer is cut, `middle` makes
it, `slicing` says what of its arguments goes by tokens; `saved` holds what autograd saves; `locality` finds layers that
cannot be cut.
"""
