// The fork server for JavaScript: a node that has started up to its last step before main.js, and is forked there.
//
// As fork_python.py, which explains it; here koffi calls libc. Two things make node forkable: the jail's filter for system
// calls ignores madvise(MADV_DONTFORK), with which V8 keeps its heap from children, and node runs without threads of its
// own (--single-threaded) and gets its event loop made anew in the child (uv_loop_fork). A few threads are nevertheless
// lost in the child, so it must leave before node waits for them.
'use strict'

const fs = require('node:fs')
const { inspect } = require('node:util')
const { queryObjects } = require('node:v8')
const koffi = require('/forkserver/node_modules/koffi')
const { findGenerator, reseed } = require('/forkserver/node_random.cjs')

const MESSAGE_BYTES = 1 << 18
const MOST_DESCRIPTORS = 16
const [REPORT, JOB, STDIN, FIRST_GROUP] = [0, 1, 2, 5]

const CLONE_NEWPID = 0x20000000
const CLONE_OTHERS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x40000000 // ns, cgroup, uts, ipc, net
const [MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MNT_DETACH] = [1, 2, 4, 8, 2]
const [PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS] = [4, 22, 24, 38]
const [PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL] = [47, 4]
const [SECCOMP_MODE_FILTER, INSTRUCTION_BYTES] = [2, 8]
const CAPABILITY_VERSION_3 = 0x20080522
const SIGKILL = 9
const EINTR = 4
const [MSG_CMSG_CLOEXEC, POLLIN, POSIX_SPAWN_SETPGROUP] = [0x40000000, 1, 2]
const SYS = { x64: { setresuid: 117, setresgid: 119 }, arm64: { setresuid: 147, setresgid: 149 } }[process.arch]
SYS.pidfd_open = 434
const [O_PATH, O_CLOEXEC] = [0x200000, 0x80000]
const RLIMIT_NOFILE = 7

const self = koffi.load(null)
const libc = {}
for (const declaration of [
  'long recvmsg(int, void *, int)', 'int fork()', 'int setpgid(int, int)', 'int unshare(int)', 'int setns(int, int)',
  'int mount(str, str, str, unsigned long, str)', 'int umount2(str, int)', 'int dup2(int, int)', 'int close(int)',
  'int prctl(int, unsigned long, uintptr_t, unsigned long, unsigned long)', 'int waitpid(int, void *, int)',
  'int kill(int, int)', 'int poll(void *, unsigned long, int)', 'long syscall(long, long, long, long)',
  'int posix_spawn(void *, str, void *, void *, const char **, const char **)',
  'int posix_spawn_file_actions_init(void *)', 'int posix_spawn_file_actions_destroy(void *)',
  'int posix_spawn_file_actions_addclose(void *, int)', 'int posix_spawn_file_actions_adddup2(void *, int, int)',
  'int posix_spawnattr_init(void *)', 'int posix_spawnattr_setflags(void *, short)',
  'int setrlimit(int, void *)', 'int capset(void *, void *)', 'void _exit(int)',
  'int memfd_create(str, uint)', 'int open(str, int)', 'void *dlsym(uintptr_t, str)', 'void *uv_default_loop()',
  'int uv_loop_fork(void *)'
]) {
  libc[declaration.match(/(\w+)\(/)[1]] = self.func(declaration)
}
// Node's own interface for embedders, by the names that its compiler gives them
libc.currentIsolate = self.func('_ZN2v87Isolate10GetCurrentEv', 'void *', [])
libc.currentContext = self.func('_ZN2v87Isolate17GetCurrentContextEv', 'void *', ['void *'])
libc.currentEnvironment = self.func('_ZN4node21GetCurrentEnvironmentEN2v85LocalINS0_7ContextEEE', 'void *', ['void *'])
libc.atExit = self.func('_ZN4node6AtExitEPNS_11EnvironmentEPFvPvES2_', 'void', ['void *', 'void *', 'uintptr_t'])

/** A function of libc; throws what it says has failed. */
function call (name, ...values) {
  const answer = libc[name](...values)
  if (answer === -1) throw new Error(`${name} failed with error ${koffi.errno()}`)
  return answer
}

const kept = []

/** Memory with an address that stays: V8 moves small arrays about, and frees what it thinks nobody needs. */
function steady (bytes) {
  kept.push(Buffer.alloc(Math.max(bytes, 1024)))
  return kept.at(-1)
}

/** Forks a child for every request. Returns in the child that is to be the program, and nowhere else. */
function serve () {
  const { filters, startFirst, generator } = begin()
  const receive = receiver()
  const ends = new Ends()
  const [ownUser, ownGroup] = [process.getuid(), process.getgid()]
  const ownPids = fs.openSync('/proc/self/ns/pid', 'r')
  for (;;) {
    ends.reportedUntilRequest()
    const { text, descriptors } = receive()
    if (!text) libc._exit(0) // the server is gone
    const request = JSON.parse(text)
    const [report, job] = descriptors
    let [init, program] = [0, -1]
    try {
      call('unshare', CLONE_NEWPID) // for the next children only
      become(request.user, request.user)
      init = startFirst(report)
      ends.watch(init)
      program = call('fork')
    } catch (failure) {
      fs.writeSync(report, `failed: ${failure.message}`)
      if (init) call('kill', init, SIGKILL)
    }
    if (program === 0) {
      try {
        libc.close(ownPids)
        ends.forget()
        makeWorld(request.scratch, descriptors.slice(FIRST_GROUP))
        giveUpRights(request.open_files, filters)
        becomeProgram(descriptors, generator)
      } catch (failure) {
        fs.writeSync(report, `failed: ${failure.message}`)
        libc._exit(1)
      }
      return { report, job }
    }
    become(ownUser, ownGroup)
    call('setns', ownPids, CLONE_NEWPID)
    if (program > 0) ends.watch(program, init, report)
    else libc.close(report)
    for (const descriptor of descriptors.slice(JOB)) libc.close(descriptor)
  }
}

function begin () {
  const buffer = Buffer.alloc(MESSAGE_BYTES)
  const setup = JSON.parse(buffer.toString('utf8', 0, fs.readSync(0, buffer)))
  const filters = setup.filters.map((hex) => {
    const instructions = steady(hex.length / 2)
    instructions.write(hex, 'hex')
    const program = steady(16) // struct sock_fprog
    program.writeUInt16LE(hex.length / 2 / INSTRUCTION_BYTES, 0)
    program.writeBigUInt64LE(BigInt(koffi.address(instructions)), 8)
    return { program, instructions }
  })
  const generator = findGenerator(BigInt(koffi.address(libc.currentIsolate())))
  rehearse()
  for (let capability = 0; libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) === 0;) capability++
  call('prctl', PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) // a program that is started has no rights
  const startFirst = firstProcesses(Buffer.from(setup.firstProcess, 'hex'))
  fs.writeSync(0, 'ready')
  return { filters, startFirst, generator }
}

/**
 * A function that starts a pid namespace's first process, as the leader of a process group. Its file is one that nobody
 * may read: so no process can look into one that runs it.
 */
function firstProcesses (content) {
  const file = call('memfd_create', 'init', 1) // MFD_CLOEXEC
  fs.writeSync(file, content)
  const path = `/proc/self/fd/${call('open', `/proc/self/fd/${file}`, O_PATH | O_CLOEXEC)}`
  fs.fchmodSync(file, 0o111)
  libc.close(file) // what is open for writing cannot be executed
  const [attributes, actions, pid] = [steady(512), steady(512), steady(4)]
  libc.posix_spawnattr_init(attributes)
  libc.posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETPGROUP) // and the group is a new one, unless told otherwise
  return (report) => {
    libc.posix_spawn_file_actions_init(actions)
    for (const number of [0, 1, 2]) libc.posix_spawn_file_actions_addclose(actions, number)
    libc.posix_spawn_file_actions_adddup2(actions, report, 3)
    const error = libc.posix_spawn(pid, path, actions, attributes, ['init', null], [null])
    libc.posix_spawn_file_actions_destroy(actions)
    if (error !== 0) throw new Error(`posix_spawn failed with error ${error}`)
    return pid.readInt32LE(0)
  }
}

/** The processes that were forked and have not ended. */
class Ends {
  #living = new Map()

  /** When `pid` has ended, so will its `init`, and `report`, which is taken over, is told. */
  watch (pid, init = 0, report = -1) {
    this.#living.set(call('syscall', SYS.pidfd_open, pid, 0, 0), { pid, init, report })
  }

  /** Hears of ends until there is something to read from the server. */
  reportedUntilRequest () {
    for (;;) {
      const descriptors = [...this.#living.keys(), 0]
      const set = Buffer.alloc(8 * descriptors.length) // of struct pollfd
      descriptors.forEach((descriptor, place) => {
        set.writeInt32LE(descriptor, 8 * place)
        set.writeInt16LE(POLLIN, 8 * place + 4)
      })
      if (libc.poll(set, descriptors.length, -1) === -1) continue // a signal came
      const ready = descriptors.filter((_, place) => set.readInt16LE(8 * place + 6) !== 0)
      for (const pidfd of ready) if (pidfd !== 0) this.#ended(pidfd)
      if (ready.length === 1 && ready[0] === 0) return
    }
  }

  /** For a child: they are not its own. */
  forget () {
    for (const [pidfd, { report }] of this.#living) {
      libc.close(pidfd)
      if (report !== -1) libc.close(report)
    }
  }

  #ended (pidfd) {
    const { pid, init, report } = this.#living.get(pidfd)
    this.#living.delete(pidfd)
    libc.close(pidfd)
    const status = Buffer.alloc(4)
    call('waitpid', pid, status, 0)
    if (init) {
      const ended = `ended ${process.hrtime.bigint()} ${status.readInt32LE(0)}`
      call('kill', init, SIGKILL)
      try { fs.writeSync(report, ended) } catch {} // the server does not listen any more
      libc.close(report)
    }
  }
}

/** Does once what nearly every program does, so that it need not be loaded and compiled in each child. */
function rehearse () {
  const { Console } = require('node:console')
  const { Writable } = require('node:stream')
  require('node:net') // what process.stdout is made of, when it is a pipe
  const quiet = new Console(new Writable({ write: (chunk, encoding, done) => done() }))
  quiet.log('%s', 1, { a: ['b', 2n, null] }, new Map([[1, new Error('rehearsal')]]))
  const { emitWarning } = process
  process.emitWarning = () => {} // it is experimental, we know
  queryObjects(class None {}) // collects garbage first; gc() of a new context would choose the seed of all later ones
  process.emitWarning = emitWarning
}

/** A function that waits for one message: its text, and the descriptors that came with it. */
function receiver () {
  const controlBytes = 16 + 4 * MOST_DESCRIPTORS
  const [text, control] = [steady(MESSAGE_BYTES), steady(controlBytes)]
  const [vector, header] = [steady(16), steady(56)] // struct iovec, struct msghdr
  vector.writeBigUInt64LE(BigInt(koffi.address(text)), 0)
  vector.writeBigUInt64LE(BigInt(text.length), 8)
  header.writeBigUInt64LE(BigInt(koffi.address(vector)), 16)
  header.writeBigUInt64LE(1n, 24)
  header.writeBigUInt64LE(BigInt(koffi.address(control)), 32)
  return () => {
    let length
    do {
      header.writeBigUInt64LE(BigInt(controlBytes), 40)
      length = libc.recvmsg(0, header, MSG_CMSG_CLOEXEC)
    } while (length === -1 && koffi.errno() === EINTR)
    const descriptors = []
    const end = length > 0 && header.readBigUInt64LE(40) >= 16n ? Number(control.readBigUInt64LE(0)) : 0
    for (let place = 16; place < end; place += 4) descriptors.push(control.readInt32LE(place))
    return { text: length > 0 ? text.toString('utf8', 0, length) : '', descriptors }
  }
}

/** Takes another user's place; the rights stay. Where there is one user only, it is nobody else's. */
function become (user, group) {
  if (user === process.getuid()) return
  call('syscall', SYS.setresgid, group, group, group) // not libc's own, which stops all threads first
  call('syscall', SYS.setresuid, user, user, user)
}

/** Moves into a new world, with nothing in it. */
function makeWorld (scratch, groups) {
  call('setpgid', 0, 1) // a signal to its process group does not reach others
  for (const group of groups) { // from here on, what is used counts as the run's
    fs.writeSync(group, '0')
    libc.close(group)
  }
  call('unshare', CLONE_OTHERS)
  call('mount', 'proc', '/proc', 'proc', MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, null)
  for (const place of ['/tmp', '/work', '/dev/shm']) {
    call('mount', 'tmpfs', place, 'tmpfs', MS_NOSUID | MS_NODEV, scratch)
  }
  call('umount2', '/forkserver', MNT_DETACH)
  process.chdir('/work')
}

/** Drops every right that could be used or regained. */
function giveUpRights (openFiles, filters) {
  const limit = Buffer.alloc(16) // struct rlimit
  limit.writeBigUInt64LE(BigInt(openFiles), 0)
  limit.writeBigUInt64LE(BigInt(openFiles), 8)
  call('setrlimit', RLIMIT_NOFILE, limit)
  const version = Buffer.alloc(8)
  version.writeUInt32LE(CAPABILITY_VERSION_3, 0)
  call('capset', version, Buffer.alloc(24))
  call('prctl', PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  for (const { program } of filters) call('prctl', PR_SET_SECCOMP, SECCOMP_MODE_FILTER, koffi.address(program), 0, 0)
  call('prctl', PR_SET_DUMPABLE, 1, 0, 0, 0)
}

/** Takes the standard streams, and becomes a node like one that has just been started. */
function becomeProgram (descriptors, generator) {
  for (const number of [0, 1, 2]) call('dup2', descriptors[STDIN + number], number)
  loseInheritance(descriptors)
  call('uv_loop_fork', libc.uv_default_loop())
  Object.defineProperty(process, 'pid', { ...Object.getOwnPropertyDescriptor(process, 'pid'), value: 2 })
  // Its parent is outside of its pid namespace. With 0 for it, a signal would reach one's own process group.
  Object.defineProperty(process, 'ppid', { ...Object.getOwnPropertyDescriptor(process, 'ppid'), value: 1 })
  reseed(generator)
  leaveEarly()
}

/**
 * Makes every descriptor that libuv and node have opened lead nowhere: the fork server and all its children share what is
 * behind them. Their numbers stay taken until libuv, which still knows them, has closed them.
 */
function loseInheritance ([report, job]) {
  const nowhere = fs.openSync('/dev/null', 'r+')
  for (const name of fs.readdirSync('/proc/self/fd')) {
    const number = Number(name)
    if (number > 2 && ![report, job, nowhere].includes(number)) libc.dup2(nowhere, number) // one has just been closed
  }
  libc.close(nowhere)
}

/**
 * Ends the process when its program is through: node itself would wait for threads that did not survive the fork. Where
 * node has something to print after 'exit' was emitted (an error that nobody caught; an await that nothing settles), it
 * goes on, and ends where embedders are told that it does.
 */
function leaveEarly () {
  const UNSETTLED_AWAIT = 13
  const environment = libc.currentEnvironment(libc.currentContext(libc.currentIsolate()))
  const exit = libc.dlsym(0, '_exit')
  process.reallyExit = (code) => libc._exit(Number(code ?? 0))
  const { emit } = process
  let uncaught = false
  process.emit = function (event, ...values) {
    if (event === 'uncaughtException') {
      const handled = failing(() => Reflect.apply(emit, this, [event, ...values]))
      uncaught = !handled
      return handled
    }
    if (event !== 'exit' || !process._exiting) return Reflect.apply(emit, this, [event, ...values])
    let code = 1
    try {
      const handled = Reflect.apply(emit, this, [event, ...values])
      code = process.exitCode ?? values[0] ?? 0
      if (!uncaught && code !== UNSETTLED_AWAIT) libc._exit(code)
      return handled
    } finally {
      libc.atExit(environment, exit, code)
    }
  }
}

/** What a handler of uncaught errors gives; if it throws itself, node ends there with a code of its own. */
function failing (handle) {
  const HANDLER_FAILED = 7
  try {
    return handle()
  } catch (error) {
    fs.writeSync(2, `${inspect(error)}\n\nNode.js ${process.version}\n`)
    return libc._exit(HANDLER_FAILED)
  }
}

module.exports = { serve }
