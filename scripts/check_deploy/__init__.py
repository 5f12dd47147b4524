"""What `scripts/check-deploy` asserts. An assertion takes rendered objects and returns its complaints, one sentence each."""
