"""The grammar of completions and the reward functions; standard library only."""
