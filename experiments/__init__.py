"""One flat file a question, each a main with absl flags."""
