//! Small random checkpoints of every family, for tests and benchmarks. (placeholder body follows)
