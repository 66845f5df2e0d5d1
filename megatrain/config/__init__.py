"""The configuration: the schema of all keys (knobs), how YAML becomes it, the rules between keys."""
