"""Passes over graphs: one idea a file, one public function each."""
