//! foregate-kernels
