"""What is known of models: their blocks, routers, experts and embeddings, found by structure."""
