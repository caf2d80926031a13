//! foregate-planner
