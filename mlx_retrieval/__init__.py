"""Train, evaluate and use retrieval models with MLX."""
