// vcsim: govmomi's vSphere simulator (Debian's package) behind a front that behaves more like a host, and that
// lets things go wrong on demand.
//
//	front (this program)  --- POST /sdk --->  simulator.Service.ServeMux (in process)
//
// The front (1) applies injection rules by the name of the SOAP method, (2) wants a session for reading properties, as
// a host does, (3) answers the snapshot methods itself: with tasks that take time and tell their progress, one task a
// machine, power states that reverts change, and snapshots that survive the process (-state). The simulator's own tasks
// are finished before the reply is sent, and its reverts leave the power alone.
//
// Rules and other levers are URLs under /_lab/; a GET of one that is not there lists them.
package main

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"encoding/xml"
	"flag"
	"fmt"
	"io/ioutil"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// ---------------------------------------------------------------- rules

type rule struct {
	ID      int    `json:"id"`
	Method  string `json:"method"` // SOAP name or "*"
	Action  string `json:"action"`
	Fault   string `json:"fault,omitempty"`   // vim25 type name
	Message string `json:"message,omitempty"` // faultstring / localizedMessage
	Status  int    `json:"status,omitempty"`  // for action=http
	MS      int    `json:"ms,omitempty"`
	Skip    int    `json:"skip"`
	Count   int    `json:"count"` // remaining; <0 = for ever
	Hits    int    `json:"hits"`
}

var actions = map[string]string{
	"fault":           "SOAP fault, method not executed",
	"drop-before":     "close the connection, method not executed",
	"drop-after":      "execute, close the connection without a reply",
	"truncate":        "execute, send half of the reply, close",
	"http":            "HTTP status N, method not executed",
	"delay":           "sleep ms, then execute",
	"delay-after":     "execute, sleep ms, reply",
	"task-fault":      "the task is accepted, ends in error, no effect",
	"task-fault-late": "the task has its effect AND ends in error",
	"task-hang":       "the task stays running until /_lab/release",
	"exit-after":      "execute, sleep ms (0: in the middle of the task), then os.Exit(3)",
	"leave-disks":     "a removal that leaves disks behind: runtime.consolidationNeeded",
}

type lab struct {
	sync.Mutex
	rules    []*rule
	nextID   int
	calls    map[string]int
	trace    []string
	issued   map[string]bool // session cookies that are valid
	delay    map[string]int  // per method ms
	taskMS   int
	busyTask bool
	real     bool
	user     string
	busy     map[types.ManagedObjectReference]string // vm -> task in flight
	state    string                                  // file that survives the process
	sid      map[types.ManagedObjectReference]int32
	maxDepth int
	gate     chan struct{} // closed and replaced by /_lab/release
	mux      http.Handler
}

func (l *lab) take(method string) *rule {
	l.Lock()
	defer l.Unlock()
	for _, r := range l.rules {
		if r.Count == 0 || (r.Method != "*" && r.Method != method) {
			continue
		}
		if r.Skip > 0 {
			r.Skip--
			continue
		}
		if r.Count > 0 {
			r.Count--
		}
		r.Hits++
		c := *r
		return &c
	}
	return nil
}

// newFault makes any vim25 fault by its type name.
func newFault(name string) types.BaseMethodFault {
	if name == "" {
		name = "SystemError"
	}
	t, ok := types.TypeFunc()(name)
	if !ok {
		return nil
	}
	f, _ := reflect.New(t).Interface().(types.BaseMethodFault)
	return f
}

// ---------------------------------------------------------------- SOAP output

func soapFault(w http.ResponseWriter, name, msg string, extra string) {
	var m bytes.Buffer
	_ = xml.EscapeText(&m, []byte(msg))
	w.Header().Set("Content-Type", `text/xml; charset="utf-8"`)
	w.WriteHeader(http.StatusInternalServerError)
	fmt.Fprintf(w, xml.Header+`<soapenv:Envelope xmlns:soapenc="http://schemas.xmlsoap.org/soap/encoding/" xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>%s</faultstring><detail><%sFault xmlns="urn:vim25" xsi:type="%s">%s</%sFault></detail></soapenv:Fault></soapenv:Body></soapenv:Envelope>`,
		m.String(), name, name, extra, name)
}

func soapTask(w http.ResponseWriter, method string, task types.ManagedObjectReference) {
	w.Header().Set("Content-Type", `text/xml; charset="utf-8"`)
	ret := ""
	if task.Value != "" {
		ret = fmt.Sprintf(`<returnval type="Task">%s</returnval>`, task.Value)
	}
	fmt.Fprintf(w, xml.Header+`<soapenv:Envelope xmlns:soapenc="http://schemas.xmlsoap.org/soap/encoding/" xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><%sResponse xmlns="urn:vim25">%s</%sResponse></soapenv:Body></soapenv:Envelope>`, method, ret, method)
}

// bodyMethod finds the name of the first element inside soap Body.
func bodyMethod(b []byte) string {
	d := xml.NewDecoder(bytes.NewReader(b))
	in := false
	for {
		t, err := d.Token()
		if err != nil {
			return ""
		}
		if s, ok := t.(xml.StartElement); ok {
			if in {
				return s.Name.Local
			}
			in = s.Name.Local == "Body"
		}
	}
}

func drop(w http.ResponseWriter) {
	if c, _, err := w.(http.Hijacker).Hijack(); err == nil {
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // RST
		}
		_ = c.Close()
	}
}

// ---------------------------------------------------------------- front

var open = map[string]bool{
	"RetrieveServiceContent": true, "Login": true, "LoginByToken": true,
	"LoginExtensionByCertificate": true, "CloneSession": true, "CurrentTime": false,
}

func (l *lab) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/_lab/") {
		l.admin(w, r)
		return
	}
	if r.Method != http.MethodPost {
		l.mux.ServeHTTP(w, r)
		return
	}
	body, err := ioutil.ReadAll(r.Body)
	if err != nil {
		return
	}
	method := bodyMethod(body)
	l.Lock()
	l.calls[method]++
	l.trace = append(l.trace, time.Now().Format("15:04:05.000 ")+method)
	ms := l.delay["*"] + l.delay[method]
	l.Unlock()
	time.Sleep(time.Duration(ms) * time.Millisecond)

	ru := l.take(method)
	act := ""
	if ru != nil {
		act = ru.Action
		log.Printf("rule %d: %s %s %s", ru.ID, method, act, ru.Fault)
	}
	switch act {
	case "fault":
		msg := ru.Message
		if msg == "" {
			msg = "injected " + ru.Fault
		}
		soapFault(w, ru.Fault, msg, "")
		return
	case "drop-before":
		drop(w)
		return
	case "http":
		w.WriteHeader(ru.Status)
		return
	case "delay":
		time.Sleep(time.Duration(ru.MS) * time.Millisecond)
	}

	rec := httptest.NewRecorder()
	l.execute(rec, r, method, body, ru)

	switch act {
	case "delay-after":
		time.Sleep(time.Duration(ru.MS) * time.Millisecond)
	case "drop-after":
		drop(w)
		return
	case "exit-after":
		time.Sleep(time.Duration(ru.MS) * time.Millisecond)
		os.Exit(3)
	}
	for k, v := range rec.Header() {
		w.Header()[k] = v
	}
	if w.Header().Get("Content-Type") == "" || strings.HasPrefix(w.Header().Get("Content-Type"), "text/xml") {
		w.Header().Set("Content-Type", `text/xml; charset="utf-8"`)
	}
	out := rec.Body.Bytes()
	w.Header().Set("Content-Length", strconv.Itoa(len(out)))
	w.WriteHeader(rec.Code)
	if act == "truncate" {
		_, _ = w.Write(out[:len(out)/2])
		w.(http.Flusher).Flush()
		drop(w)
		return
	}
	_, _ = w.Write(out)
}

// session: who may call what, then the overlay, then the simulator.
func (l *lab) execute(w *httptest.ResponseRecorder, r *http.Request, method string, body []byte, ru *rule) {
	ok := false
	if c, err := r.Cookie(soap.SessionCookieName); err == nil {
		l.Lock()
		ok = l.issued[c.Value]
		l.Unlock()
	}
	if !ok {
		r.Header.Del("Cookie")
		if !open[method] {
			soapFault(w, "NotAuthenticated", "The session is not authenticated.",
				`<object type="Folder">ha-folder-root</object><privilegeId>System.View</privilegeId>`)
			return
		}
	}
	if l.real && l.overlay(w, method, body, ru) {
		return
	}
	r.Body = ioutil.NopCloser(bytes.NewReader(body))
	if !l.inner(w, r, method) {
		return
	}
	if strings.HasPrefix(method, "Power") || method == "SuspendVM_Task" {
		l.save()
	}
	for _, c := range w.Result().Cookies() {
		if c.Name == soap.SessionCookieName && c.Value != "" {
			l.Lock()
			l.issued[c.Value] = true
			l.Unlock()
		}
	}
	if method == "Logout" && w.Code == 200 {
		if c, err := r.Cookie(soap.SessionCookieName); err == nil {
			l.Lock()
			delete(l.issued, c.Value)
			l.Unlock()
		}
	}
}

// inner calls the simulator; its panics become what a host would say. Fetch of an
// unset property (pyvmomi reads vm.snapshot so) panics in 0.24.2.
func (l *lab) inner(w *httptest.ResponseRecorder, r *http.Request, method string) (ok bool) {
	defer func() {
		if e := recover(); e != nil {
			log.Printf("simulator panic in %s: %v", method, e)
			w.Body.Reset()
			if method == "Fetch" {
				soapTask(w, method, types.ManagedObjectReference{})
				return
			}
			soapFault(w, "SystemError", "simulator panic", "<reason>panic</reason>")
		}
	}()
	l.mux.ServeHTTP(w, r)
	return true
}

// ---------------------------------------------------------------- admin

func (l *lab) admin(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	num := func(k string, d int) int {
		if n, err := strconv.Atoi(q.Get(k)); err == nil {
			return n
		}
		return d
	}
	say := func(v interface{}) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	l.Lock()
	defer l.Unlock()
	switch r.URL.Path {
	case "/_lab/inject":
		a := q.Get("action")
		if actions[a] == "" || q.Get("method") == "" {
			w.WriteHeader(400)
			say(actions)
			return
		}
		f := q.Get("fault")
		if f != "" && newFault(f) == nil {
			w.WriteHeader(400)
			say("not a vim25 fault: " + f)
			return
		}
		if f == "" {
			f = "SystemError"
		}
		l.nextID++
		ru := &rule{ID: l.nextID, Method: q.Get("method"), Action: a, Fault: f, Message: q.Get("message"),
			Status: num("status", 503), MS: num("ms", 1000), Skip: num("skip", 0), Count: num("count", 1)}
		l.rules = append(l.rules, ru)
		say(ru)
	case "/_lab/rules":
		say(l.rules)
	case "/_lab/reset":
		l.rules, l.calls, l.trace = nil, map[string]int{}, nil
		close(l.gate)
		l.gate = make(chan struct{})
		say("ok")
	case "/_lab/calls":
		say(map[string]interface{}{"count": l.calls, "trace": l.trace})
	case "/_lab/expire":
		n := len(l.issued)
		l.issued = map[string]bool{}
		say(fmt.Sprintf("%d sessions expired", n))
	case "/_lab/release":
		close(l.gate)
		l.gate = make(chan struct{})
		say("ok")
	case "/_lab/state":
		type vmState struct {
			Name, Ref, Uuid, Power string
			Current                string
			Snapshots              []string
			Busy                   string
			Consolidate            *bool
		}
		var out []vmState
		for _, e := range simulator.Map.All("VirtualMachine") {
			vm := e.(*simulator.VirtualMachine)
			s := vmState{Name: vm.Name, Ref: vm.Self.Value, Uuid: vm.Config.Uuid,
				Power: string(vm.Runtime.PowerState), Busy: l.busy[vm.Self], Consolidate: vm.Runtime.ConsolidationNeeded}
			if vm.Snapshot != nil {
				if vm.Snapshot.CurrentSnapshot != nil {
					s.Current = vm.Snapshot.CurrentSnapshot.Value
				}
				walk(vm.Snapshot.RootSnapshotList, 0, func(t *types.VirtualMachineSnapshotTree, d int) {
					s.Snapshots = append(s.Snapshots, fmt.Sprintf("%s%s %q id=%d %s", strings.Repeat("  ", d), t.Snapshot.Value, t.Name, t.Id, t.State))
				})
			}
			out = append(out, s)
		}
		sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
		say(out)
	default:
		w.WriteHeader(404)
		say([]string{"/_lab/inject?method=&action=&fault=&message=&count=&skip=&ms=&status=", "/_lab/rules", "/_lab/reset", "/_lab/calls", "/_lab/expire", "/_lab/release", "/_lab/state"})
	}
}

// ---------------------------------------------------------------- overlay

type tree = types.VirtualMachineSnapshotTree

func walk(list []tree, d int, f func(*tree, int)) {
	for i := range list {
		f(&list[i], d)
		walk(list[i].ChildSnapshotList, d+1, f)
	}
}

func copyTree(list []tree) []tree {
	var out []tree
	for _, t := range list {
		t.ChildSnapshotList = copyTree(t.ChildSnapshotList)
		out = append(out, t)
	}
	return out
}

func findT(list []tree, ref types.ManagedObjectReference) (hit *tree, parent *types.ManagedObjectReference, depth int) {
	var rec func([]tree, *types.ManagedObjectReference, int)
	rec = func(l []tree, p *types.ManagedObjectReference, d int) {
		for i := range l {
			if l[i].Snapshot == ref {
				hit, parent, depth = &l[i], p, d
			}
			self := l[i].Snapshot
			rec(l[i].ChildSnapshotList, &self, d+1)
		}
	}
	rec(list, nil, 1)
	return
}

// without takes ref out of the tree; its children go to its parent unless whole.
func without(list []tree, ref types.ManagedObjectReference, whole bool) []tree {
	var out []tree
	for _, t := range list {
		if t.Snapshot == ref {
			if !whole {
				out = append(out, t.ChildSnapshotList...)
			}
			continue
		}
		t.ChildSnapshotList = without(t.ChildSnapshotList, ref, whole)
		out = append(out, t)
	}
	return out
}

func put(vm *simulator.VirtualMachine, roots []tree, cur *types.ManagedObjectReference) {
	var val types.AnyType
	if len(roots) > 0 {
		val = types.VirtualMachineSnapshotInfo{CurrentSnapshot: cur, RootSnapshotList: roots}
	}
	var rr []types.ManagedObjectReference
	for _, t := range roots {
		rr = append(rr, t.Snapshot)
	}
	vm.RootSnapshot = rr
	simulator.Map.Update(vm, []types.PropertyChange{{Name: "snapshot", Val: val}})
}

var needsVM = map[string]bool{
	"CreateSnapshot_Task": true, "CreateSnapshotEx_Task": true, "RevertToCurrentSnapshot_Task": true,
	"RemoveAllSnapshots_Task": true, "ConsolidateVMDisks_Task": true,
}
var needsSnap = map[string]bool{
	"RevertToSnapshot_Task": true, "RemoveSnapshot_Task": true, "RenameSnapshot": true,
}

func badName(n string) bool { return n == "" || len([]rune(n)) > 80 }

// overlay answers a snapshot method; false = leave it to the simulator.
func (l *lab) overlay(w http.ResponseWriter, method string, raw []byte, ru *rule) bool {
	if !needsVM[method] && !needsSnap[method] {
		return false
	}
	m, err := simulator.UnmarshalBody(types.TypeFunc(), raw)
	if err != nil {
		soapFault(w, "InvalidRequest", err.Error(), "")
		return true
	}
	obj := simulator.Map.Get(m.This)
	gone := func() bool {
		soapFault(w, "ManagedObjectNotFound", "The object '"+m.This.String()+"' has already been deleted or has not been completely created",
			fmt.Sprintf(`<obj type="%s">%s</obj>`, m.This.Type, m.This.Value))
		return true
	}
	var vm *simulator.VirtualMachine
	var snap *simulator.VirtualMachineSnapshot
	if needsVM[method] {
		vm, _ = obj.(*simulator.VirtualMachine)
	} else if snap, _ = obj.(*simulator.VirtualMachineSnapshot); snap != nil {
		vm, _ = simulator.Map.Get(snap.Vm).(*simulator.VirtualMachine)
	}
	if vm == nil {
		return gone()
	}

	var op func() (types.AnyType, types.BaseMethodFault)
	kind := ""
	switch req := m.Body.(type) {
	case *types.CreateSnapshot_Task:
		if badName(req.Name) {
			soapFault(w, "InvalidName", "The name '"+req.Name+"' is not valid.", "<name>"+req.Name+"</name>")
			return true
		}
		kind = "createSnapshot"
		op = func() (types.AnyType, types.BaseMethodFault) {
			return l.create(vm, req.Name, req.Description, req.Memory, req.Quiesce)
		}
	case *types.CreateSnapshotEx_Task:
		if badName(req.Name) {
			soapFault(w, "InvalidName", "The name '"+req.Name+"' is not valid.", "<name>"+req.Name+"</name>")
			return true
		}
		kind = "createSnapshotEx"
		op = func() (types.AnyType, types.BaseMethodFault) {
			return l.create(vm, req.Name, req.Description, req.Memory, req.QuiesceSpec != nil)
		}
	case *types.RevertToCurrentSnapshot_Task:
		if vm.Snapshot == nil || vm.Snapshot.CurrentSnapshot == nil {
			soapFault(w, "NotFound", "The virtual machine has no current snapshot.", "")
			return true
		}
		kind = "revertToCurrentSnapshot"
		op = func() (types.AnyType, types.BaseMethodFault) {
			return nil, revert(vm, *vm.Snapshot.CurrentSnapshot, req.SuppressPowerOn)
		}
	case *types.RevertToSnapshot_Task:
		kind = "revertToSnapshot"
		op = func() (types.AnyType, types.BaseMethodFault) { return nil, revert(vm, m.This, req.SuppressPowerOn) }
	case *types.RemoveAllSnapshots_Task:
		kind = "removeAllSnapshots"
		op = func() (types.AnyType, types.BaseMethodFault) {
			if vm.Snapshot != nil {
				walk(vm.Snapshot.RootSnapshotList, 0, func(t *tree, _ int) { simulator.Map.Remove(t.Snapshot) })
			}
			put(vm, nil, nil)
			return nil, nil
		}
	case *types.RemoveSnapshot_Task:
		kind = "removeSnapshot"
		op = func() (types.AnyType, types.BaseMethodFault) { return nil, remove(vm, m.This, req.RemoveChildren) }
	case *types.ConsolidateVMDisks_Task:
		kind = "consolidateVMDisks"
		op = func() (types.AnyType, types.BaseMethodFault) {
			vm.Runtime.ConsolidationNeeded = types.NewBool(false)
			return nil, nil
		}
	case *types.RenameSnapshot:
		if req.Name != "" && badName(req.Name) {
			soapFault(w, "InvalidName", "The name is not valid.", "")
			return true
		}
		simulator.Map.WithLock(vm, func() {
			roots := copyTree(vm.Snapshot.RootSnapshotList)
			if t, _, _ := findT(roots, m.This); t != nil {
				if req.Name != "" {
					t.Name = req.Name
				}
				if req.Description != "" {
					t.Description = req.Description
				}
			}
			put(vm, roots, vm.Snapshot.CurrentSnapshot)
		})
		soapTask(w, method, types.ManagedObjectReference{})
		return true
	}

	var task *simulator.Task
	l.Lock()
	by := l.busy[vm.Self]
	gate := l.gate
	if by != "" {
		l.Unlock()
		if !l.busyTask {
			soapFault(w, "TaskInProgress", "Another task is already in progress.", `<task type="Task">`+by+`</task>`)
			return true
		}
		op = func() (types.AnyType, types.BaseMethodFault) {
			return nil, &types.TaskInProgress{Task: types.ManagedObjectReference{Type: "Task", Value: by}}
		}
	}

	hang := ru != nil && ru.Action == "task-hang"
	run := func(*simulator.Task) (res types.AnyType, fault types.BaseMethodFault) {
		if ru != nil && ru.Action == "task-fault" {
			return nil, newFault(ru.Fault)
		}
		simulator.Map.WithLock(vm, func() {
			res, fault = op()
			l.save()
		})
		if ru != nil && ru.Action == "leave-disks" {
			vm.Runtime.ConsolidationNeeded = types.NewBool(true)
		}
		if ru != nil && ru.Action == "task-fault-late" {
			return nil, newFault(ru.Fault)
		}
		return
	}
	task = simulator.CreateTask(vm, kind, run)
	task.Info.Reason = &types.TaskReasonUser{UserName: l.user}
	if by == "" {
		l.busy[vm.Self] = task.Self.Value
		l.Unlock()
	}
	simulator.Map.WithLock(vm, func() {
		recent := append(append([]types.ManagedObjectReference(nil), vm.RecentTask...), task.Self)
		if len(recent) > 10 {
			recent = recent[1:]
		}
		simulator.Map.Update(vm, []types.PropertyChange{{Name: "recentTask", Val: recent}})
	})
	finish := func() {
		if by == "" {
			steps := 4
			for i := 0; i < steps && l.taskMS > 0; i++ {
				simulator.Map.WithLock(task, func() {
					simulator.Map.Update(task, []types.PropertyChange{
						{Name: "info.state", Val: types.TaskInfoStateRunning},
						{Name: "info.progress", Val: int32(i * 100 / steps)},
					})
				})
				time.Sleep(time.Duration(l.taskMS/steps) * time.Millisecond)
			}
			if hang {
				<-gate
			}
		}
		simulator.Map.WithLock(task, func() { task.Run() })
		if by == "" {
			l.Lock()
			delete(l.busy, vm.Self)
			l.Unlock()
		}
	}
	if l.taskMS > 0 || hang {
		go finish()
	} else {
		finish()
	}
	soapTask(w, method, task.Self)
	return true
}

func (l *lab) create(vm *simulator.VirtualMachine, name, desc string, memory, quiesce bool) (types.AnyType, types.BaseMethodFault) {
	var roots []tree
	var cur *types.ManagedObjectReference
	if vm.Snapshot != nil {
		roots, cur = copyTree(vm.Snapshot.RootSnapshotList), vm.Snapshot.CurrentSnapshot
	}
	var up *tree
	if cur != nil {
		var depth int
		if up, _, depth = findT(roots, *cur); depth >= l.maxDepth {
			return nil, &types.TooManySnapshotLevels{}
		}
	}
	state := types.VirtualMachinePowerStatePoweredOff
	if memory {
		state = vm.Runtime.PowerState
	}
	l.Lock()
	l.sid[vm.Self]++
	id := l.sid[vm.Self]
	l.Unlock()
	s := putSnapshot(vm, id)
	item := tree{Snapshot: s.Self, Vm: vm.Self, Name: name, Description: desc, Id: id,
		CreateTime: time.Now().UTC(), State: state, Quiesced: quiesce, ReplaySupported: types.NewBool(false)}
	if up != nil {
		up.ChildSnapshotList = append(up.ChildSnapshotList, item)
	} else {
		roots = append(roots, item)
	}
	put(vm, roots, &item.Snapshot)
	return s.Self, nil
}

// putSnapshot names the object as an ESXi host does: <vm>-snapshot-<id>, stable
// over a restart, unlike the simulator's counter.
func putSnapshot(vm *simulator.VirtualMachine, id int32) *simulator.VirtualMachineSnapshot {
	s := &simulator.VirtualMachineSnapshot{VirtualMachineSnapshot: mo.VirtualMachineSnapshot{Vm: vm.Self, Config: *vm.Config}}
	s.Self = types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: fmt.Sprintf("%s-snapshot-%d", vm.Self.Value, id)}
	simulator.Map.Put(s)
	return s
}

type saved struct {
	Sid   int32
	Power types.VirtualMachinePowerState
	Cur   *types.ManagedObjectReference
	Roots []tree
}

// save writes what a host keeps on its datastore; called with the VM locked.
func (l *lab) save() {
	if l.state == "" {
		return
	}
	l.Lock()
	defer l.Unlock()
	all := map[string]saved{}
	for _, e := range simulator.Map.All("VirtualMachine") {
		vm := e.(*simulator.VirtualMachine)
		v := saved{Sid: l.sid[vm.Self], Power: vm.Runtime.PowerState}
		if vm.Snapshot != nil {
			v.Cur, v.Roots = vm.Snapshot.CurrentSnapshot, vm.Snapshot.RootSnapshotList
		}
		all[vm.Name] = v
	}
	b, _ := json.Marshal(all)
	if err := ioutil.WriteFile(l.state+".tmp", b, 0644); err == nil {
		_ = os.Rename(l.state+".tmp", l.state)
	}
}

func (l *lab) load() {
	b, err := ioutil.ReadFile(l.state)
	if err != nil {
		return
	}
	all := map[string]saved{}
	if err := json.Unmarshal(b, &all); err != nil {
		log.Fatal(err)
	}
	for _, e := range simulator.Map.All("VirtualMachine") {
		vm := e.(*simulator.VirtualMachine)
		v, ok := all[vm.Name]
		if !ok {
			continue
		}
		l.sid[vm.Self] = v.Sid
		walk(v.Roots, 0, func(t *tree, _ int) { putSnapshot(vm, t.Id) })
		put(vm, v.Roots, v.Cur)
		vm.Runtime.PowerState, vm.Summary.Runtime.PowerState = v.Power, v.Power
	}
}

func revert(vm *simulator.VirtualMachine, ref types.ManagedObjectReference, suppress *bool) types.BaseMethodFault {
	roots := copyTree(vm.Snapshot.RootSnapshotList)
	t, _, _ := findT(roots, ref)
	if t == nil {
		return &types.ManagedObjectNotFound{Obj: ref}
	}
	state := t.State
	if suppress != nil && *suppress {
		state = types.VirtualMachinePowerStatePoweredOff
	}
	put(vm, roots, &ref)
	if state == types.VirtualMachinePowerStatePoweredOn {
		now := time.Now()
		vm.Runtime.BootTime = &now
	}
	simulator.Map.Update(vm, []types.PropertyChange{{Name: "runtime.powerState", Val: state}, {Name: "summary.runtime.powerState", Val: state}})
	return nil
}

func remove(vm *simulator.VirtualMachine, ref types.ManagedObjectReference, whole bool) types.BaseMethodFault {
	if vm.Snapshot == nil {
		return &types.ManagedObjectNotFound{Obj: ref}
	}
	roots, cur := copyTree(vm.Snapshot.RootSnapshotList), vm.Snapshot.CurrentSnapshot
	t, parent, _ := findT(roots, ref)
	if t == nil {
		return &types.ManagedObjectNotFound{Obj: ref}
	}
	dead := []types.ManagedObjectReference{ref}
	if whole {
		walk(t.ChildSnapshotList, 0, func(c *tree, _ int) { dead = append(dead, c.Snapshot) })
	}
	for _, d := range dead {
		if cur != nil && *cur == d {
			cur = parent // the parent becomes current, as on a host
		}
	}
	put(vm, without(roots, ref, whole), cur)
	for _, d := range dead {
		simulator.Map.Remove(d)
	}
	return nil
}

// ---------------------------------------------------------------- main

func main() {
	listen := flag.String("l", "127.0.0.1:8989", "address (keep it on loopback)")
	model := flag.String("model", "esx", "esx | vpx")
	vms := flag.Int("vms", 2, "virtual machines (per host/pool)")
	user := flag.String("user", "root", "user")
	pass := flag.String("pass", "secret", "password")
	useTLS := flag.Bool("tls", false, "TLS with Go's built-in test certificate")
	delays := flag.String("delay", "", "method=ms,... (*=all)")
	taskMS := flag.Int("task-ms", 400, "duration of snapshot tasks; 0 = done before the reply")
	busy := flag.String("busy", "fault", "second task on a busy VM: fault (SOAP) | task (task ends in error)")
	realSem := flag.Bool("real", true, "host-like snapshot semantics (false: the simulator's own)")
	idle := flag.Duration("idle", 0, "session idle timeout (simulator's)")
	depth := flag.Int("depth", 32, "snapshot levels before TooManySnapshotLevels")
	tools := flag.Bool("tools", false, "VMware Tools run in every guest")
	stateFile := flag.String("state", "", "file to keep snapshots in, so that they survive a kill")
	tag := flag.Bool("xmltrace", false, "SOAP trace on stderr")
	flag.Parse()

	simulator.Trace = *tag
	simulator.SessionIdleTimeout = *idle
	m := simulator.ESX()
	if *model == "vpx" {
		m = simulator.VPX()
	}
	m.Machine = *vms
	if err := m.Create(); err != nil {
		log.Fatal(err)
	}
	m.Service.Listen = &url.URL{Host: "127.0.0.1:0", User: url.UserPassword(*user, *pass)}
	inner := m.Service.NewServer()
	defer inner.Close()

	l := &lab{calls: map[string]int{}, issued: map[string]bool{}, delay: map[string]int{}, taskMS: *taskMS,
		busyTask: *busy == "task", real: *realSem, user: *user, busy: map[types.ManagedObjectReference]string{},
		sid: map[types.ManagedObjectReference]int32{}, maxDepth: *depth, gate: make(chan struct{}), mux: m.Service.ServeMux}
	for _, e := range simulator.Map.All("VirtualMachine") {
		if vm := e.(*simulator.VirtualMachine); *tools && vm.Guest != nil {
			vm.Guest.ToolsRunningStatus = string(types.VirtualMachineToolsRunningStatusGuestToolsRunning)
		}
	}
	if l.state = *stateFile; l.state != "" {
		l.load()
	}
	for _, d := range strings.Split(*delays, ",") {
		if kv := strings.SplitN(d, "=", 2); len(kv) == 2 {
			l.delay[kv[0]], _ = strconv.Atoi(kv[1])
		}
	}
	ts := httptest.NewUnstartedServer(l)
	ln, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	_ = ts.Listener.Close()
	ts.Listener = ln
	if *useTLS {
		ts.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		ts.StartTLS()
		der := ts.TLS.Certificates[0].Certificate[0]
		fmt.Printf("thumbprint-sha1 %X\nthumbprint-sha256 %X\n", sha1.Sum(der), sha256.Sum256(der))
	} else {
		ts.Start()
	}
	fmt.Printf("url %s/sdk\npid %d\n", ts.URL, os.Getpid())
	for _, e := range simulator.Map.All("VirtualMachine") {
		vm := e.(*simulator.VirtualMachine)
		fmt.Printf("vm %s %s %s\n", vm.Self.Value, vm.Config.Uuid, vm.Name)
	}
	fmt.Println("ready")
	select {}
}
