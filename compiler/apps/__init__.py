"""Programs built on effc: federation, test-time compute, serving."""
