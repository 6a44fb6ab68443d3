"""What a good completion is: the grammar and the rewards; standard library only."""
