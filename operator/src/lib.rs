//! foregate-operator
