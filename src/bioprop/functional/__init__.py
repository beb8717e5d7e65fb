"""The mathematics as pure functions: batch first, no Lightning, no logging, no state."""
