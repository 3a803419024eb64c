"""HopWorld: invented people, facts about them, questions that need a search per hop."""
