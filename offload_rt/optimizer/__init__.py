"""Training all parameters: fp32 masters and optimizer state in the tiers, updated where they lie. And adapters.

interface   what an engine asks of whatever trains
pieces      what state there is and in which units it moves
rules       the arithmetic of one parameter's update
arrivals    gradients on their way from a device
gradients   where gradients wait between backward and update
state       where masters, moments and new weights rest
landing     new weights on their way into a device's memory
state_slots state on its way: read ahead, written behind
stepper     updates it, block after block
stand_ins   what `.grad` is while a gradient is elsewhere
commits     which steps are committed, and whether the state is whole
log_commit  what another run has committed, taken over
step        what is known of a step
ahead       blocks stepped before the norm is known, taken back where it says so
training    the step itself: norm, clipping, redoing, dropping
tiered      the optimizer that the user sees; its param_groups by name
adapters    the same for adapters: weights and gradients in memory, state in the tiers
in_memory   and for adapters whose state torch holds
"""
