-- A support desk, as an engineer has one: who works there, who asked, and what about.
CREATE TABLE agents (id INTEGER PRIMARY KEY, name TEXT, team TEXT);
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, plan TEXT);
CREATE TABLE tickets (
  id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers(id),
  agent_id INTEGER REFERENCES agents(id), subject TEXT, state TEXT, priority TEXT, hours INTEGER);
INSERT INTO agents VALUES
  (1, 'Ada Moss', 'billing'),
  (2, 'Ben Reed', 'product'),
  (3, 'Cleo Hale', 'product'),
  (4, 'Dan Stone', 'billing');
INSERT INTO customers VALUES
  (1, 'Acme', 'free'),
  (2, 'Birch', 'pro'),
  (3, 'Corvo', 'pro'),
  (4, 'Delta', 'team'),
  (5, 'Elm', 'free');
INSERT INTO tickets VALUES
  (1, 2, 3, 'invoice is wrong', 'closed', 'normal', 10),
  (2, 1, 1, 'login fails', 'closed', 'urgent', 19),
  (3, 1, 2, 'password reset', 'closed', 'low', 7),
  (4, 3, 2, 'login fails', 'closed', 'normal', 13),
  (5, 2, 3, 'slow reports', 'closed', 'low', 39),
  (6, 3, 4, 'cannot export', 'open', 'low', 31),
  (7, 3, 1, 'slow reports', 'open', 'normal', 37),
  (8, 3, 2, 'missing order', 'closed', 'urgent', 19),
  (9, 4, 4, 'app crashes', 'open', 'normal', 17),
  (10, 1, 1, 'login fails', 'closed', 'urgent', 18),
  (11, 5, 4, 'password reset', 'open', 'urgent', 13),
  (12, 1, 4, 'cannot export', 'closed', 'normal', 12),
  (13, 3, 4, 'password reset', 'waiting', 'low', 21),
  (14, 1, 1, 'cannot export', 'closed', 'urgent', 40),
  (15, 2, 1, 'password reset', 'open', 'normal', 30),
  (16, 1, 1, 'password reset', 'open', 'normal', 21),
  (17, 1, 3, 'slow reports', 'closed', 'low', 27),
  (18, 5, 1, 'slow reports', 'waiting', 'low', 29),
  (19, 3, 2, 'slow reports', 'closed', 'urgent', 11),
  (20, 3, 1, 'password reset', 'open', 'normal', 11),
  (21, 3, 3, 'slow reports', 'waiting', 'low', 29),
  (22, 2, 4, 'cannot export', 'open', 'low', 4),
  (23, 1, 2, 'app crashes', 'waiting', 'low', 35),
  (24, 4, 2, 'password reset', 'open', 'low', 34),
  (25, 3, 4, 'cannot export', 'closed', 'low', 16),
  (26, 4, 4, 'refund', 'open', 'low', 27),
  (27, 4, 2, 'missing order', 'open', 'normal', 13),
  (28, 1, 1, 'slow reports', 'closed', 'low', 34),
  (29, 2, 2, 'missing order', 'closed', 'low', 21),
  (30, 1, 3, 'invoice is wrong', 'waiting', 'normal', 3);
