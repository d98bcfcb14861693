// Command container is what containers of the end-to-end tests run: it serves a TCP port, given as its argument, and does what it is told there, a line each.
//
//	count            how many times it was asked that, since it was started
//	env NAME         a variable of its environment
//	read PATH        a file
//	write PATH TEXT  writes one, durably
//	host             the host name of its kernel
//	exit STATUS      ends
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
)

var count atomic.Int64

func main() {
	l, err := net.Listen("tcp", ":"+os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("serving port", os.Args[1])
	if path := os.Getenv("NOTIFY_SOCKET"); path != "" {
		if conn, err := net.Dial("unixgram", path); err != nil {
			fmt.Fprintln(os.Stderr, "cannot say that it is ready:", err)
		} else {
			fmt.Fprint(conn, "READY=1")
			conn.Close()
		}
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			os.Exit(1)
		}
		go serve(conn)
	}
}

func serve(conn net.Conn) {
	defer conn.Close()
	for in := bufio.NewScanner(conn); in.Scan(); {
		word, rest, _ := strings.Cut(in.Text(), " ")
		path, text, _ := strings.Cut(rest, " ")
		var answer string
		var err error
		switch word {
		case "count":
			answer = strconv.FormatInt(count.Add(1), 10)
		case "env":
			answer = os.Getenv(rest)
		case "read":
			var b []byte
			b, err = os.ReadFile(path)
			answer = strings.TrimSpace(string(b))
		case "write":
			var f *os.File
			if f, err = os.Create(path); err == nil {
				fmt.Fprintln(f, text)
				err = f.Sync()
				f.Close()
			}
		case "host":
			answer, err = os.Hostname()
		case "exit":
			status, _ := strconv.Atoi(rest)
			os.Exit(status)
		}
		if err != nil {
			answer = "error: " + err.Error()
		}
		fmt.Fprintf(conn, "%q\n", answer)
	}
}
