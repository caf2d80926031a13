//! foregate-gateway
