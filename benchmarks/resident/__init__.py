"""What does a message cost a node whose framework starts a process for each?"""
