"""What several test files share: models, messages, ledgers, data, reference walks."""
