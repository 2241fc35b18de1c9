"""Learning from generations: what is trained on next (`loop`), and how it is done (`work`, `trainer`, `samples`)."""
