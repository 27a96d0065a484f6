"""Decides before the first step what rests where and what is fetched when. Imports neither torch nor offload_rt."""
