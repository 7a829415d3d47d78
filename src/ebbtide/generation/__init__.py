"""Token by token: what a step needs of a model, which token comes next, and when it ends."""
