//! D: what somebody else keeps in an image.
