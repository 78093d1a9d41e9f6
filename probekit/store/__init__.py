"""What is on disk: sealed files, shards, results, the folder of a run. Without torch."""
