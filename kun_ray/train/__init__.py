"""Training with DeepSpeed ZeRO-3 on Ray: from instruction pairs to a model that the pools can serve."""
