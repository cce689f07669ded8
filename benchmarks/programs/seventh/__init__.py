"""Programs of public reports as plain searches gave them, none left out as too easy."""
