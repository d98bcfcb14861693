package deptest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// TestDocumented holds every room to a package comment, and every exported name to one of its own. A field or method of what is not
// exported, and what is generated, is nobody's to read; of a group, the group's comment is enough, as is a line's.
func TestDocumented(t *testing.T) {
	folders := map[string][]string{}
	err := filepath.WalkDir("../../pkg", func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") && !strings.HasSuffix(path, ".pb.go") {
			folders[filepath.Dir(path)] = append(folders[filepath.Dir(path)], path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(folders) < len(mayImport) {
		t.Fatalf("found %d packages, there are %d rooms", len(folders), len(mayImport))
	}
	for folder, paths := range folders {
		files := token.NewFileSet()
		taught := false
		for _, path := range paths {
			f, err := parser.ParseFile(files, path, nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			taught = taught || f.Doc != nil
			lacks := func(at ast.Node, name string) { t.Errorf("%v: %s has no comment", files.Position(at.Pos()), name) }
			for _, d := range f.Decls {
				switch d := d.(type) {
				case *ast.FuncDecl:
					if d.Name.IsExported() && d.Doc == nil && exportedReceiver(d) && !obvious[d.Name.Name] {
						lacks(d, d.Name.Name)
					}
				case *ast.GenDecl:
					for _, s := range d.Specs {
						switch s := s.(type) {
						case *ast.TypeSpec:
							if s.Name.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
								lacks(s, s.Name.Name)
							}
						case *ast.ValueSpec:
							for _, n := range s.Names {
								if n.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
									lacks(s, n.Name)
								}
							}
						}
					}
				}
			}
		}
		if !taught {
			t.Errorf("%s has no package comment", folder)
		}
	}
}

// obvious are methods whose meaning is that of a well-known interface.
var obvious = map[string]bool{
	"String": true, "Error": true, "Unwrap": true, "Is": true, "Read": true, "Write": true, "Close": true, "Len": true,
	"ReadAt": true, "WriteAt": true, "Size": true, "Flush": true, "Discard": true, "NextData": true, "MarshalJSON": true, "UnmarshalJSON": true, "MarshalText": true, "UnmarshalText": true,
}

// exportedReceiver reports whether a function is one, or a method of an exported type.
func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	e := d.Recv.List[0].Type
	if star, ok := e.(*ast.StarExpr); ok {
		e = star.X
	}
	if index, ok := e.(*ast.IndexExpr); ok {
		e = index.X
	}
	name, ok := e.(*ast.Ident)
	return ok && name.IsExported()
}
