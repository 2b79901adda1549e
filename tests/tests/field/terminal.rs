//! U: at the terminal.
