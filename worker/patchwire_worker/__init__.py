"""The worker: holds models, checks graphs, runs them inside the forward pass, streams back what was asked for."""
