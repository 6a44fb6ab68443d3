"""Everything with weights: the stages, the model families and the functions they are made of."""
