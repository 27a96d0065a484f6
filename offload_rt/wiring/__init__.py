"""From a model and a plan that was checked to the runtime around it."""
