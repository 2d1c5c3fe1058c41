"""Other RL libraries on the token environments."""
