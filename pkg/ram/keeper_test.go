package ram

func keeperMain() {}
