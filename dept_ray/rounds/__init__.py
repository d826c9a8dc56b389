"""*Rounds*: many silos become one body, without Ray."""
