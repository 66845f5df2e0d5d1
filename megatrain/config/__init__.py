"""Every knob, how YAML becomes it, and the rules between knobs."""
