"""Where the coordinator's truth lies: the journal, the inline payloads, and the views made of them."""
