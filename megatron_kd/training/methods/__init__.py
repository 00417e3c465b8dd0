"""Methods that train on generated text: GKD, DistiLLM, MiniLLM. Each is a source of batches and an objective."""
