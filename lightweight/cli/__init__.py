"""What does a command of `lightweight` do: plan, train, sweep, calibrate, look at data, chat, report, hold against?"""
