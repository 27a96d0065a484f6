"""Training all parameters: fp32 masters and optimizer state in the tiers, updated where they lie.

pieces      what state there is and in which units it moves
rules       the arithmetic of one parameter's update
gradients   where gradients wait between backward and update
state       where masters, moments and new weights rest
stepper     reads ahead, updates, writes behind
training    the step: norm, clipping, redoing, dropping, committing; the optimizer that the user sees
"""
