"""What a machine and a model's blocks take, measured by running them."""
