// npm ssh2's server with node's fs under it: sftp_ssh2.js PORT HOST_KEY AUTHORIZED_KEYS
const fs = require('fs');
const path = require('path');
const {Server, utils} = require('ssh2');

const {STATUS_CODE, OPEN_MODE} = utils.sftp;
const [port, hostKey, authorized] = process.argv.slice(2);
const known = utils.parseKey(fs.readFileSync(authorized));

const attributes = info => ({mode: info.mode, uid: info.uid, gid: info.gid, size: info.size,
                             atime: Math.floor(info.atimeMs / 1000), mtime: Math.floor(info.mtimeMs / 1000)});
const openFlags = flags => [[OPEN_MODE.CREAT, 'O_CREAT'], [OPEN_MODE.TRUNC, 'O_TRUNC'], [OPEN_MODE.EXCL, 'O_EXCL'],
                            [OPEN_MODE.APPEND, 'O_APPEND']].reduce(
  (all, [asked, flag]) => flags & asked ? all | fs.constants[flag] : all,
  flags & OPEN_MODE.WRITE ? flags & OPEN_MODE.READ ? fs.constants.O_RDWR : fs.constants.O_WRONLY : 0);
const codes = {ENOENT: STATUS_CODE.NO_SUCH_FILE, EACCES: STATUS_CODE.PERMISSION_DENIED};

function serve(sftp) {
  const handles = new Map();
  let last = 0;
  const keep = (id, what) => {
    const handle = Buffer.alloc(4);
    handle.writeUInt32BE(++last);
    handles.set(last, what);
    sftp.handle(id, handle);
  };
  const of = handle => handles.get(handle.readUInt32BE(0));
  const done = id => error => sftp.status(id, error ? codes[error.code] || STATUS_CODE.FAILURE : STATUS_CODE.OK);
  const told = (id, answer) => (error, value) => error ? done(id)(error) : answer(value);
  const name = (id, value) => sftp.name(id, [{filename: value, longname: value, attrs: {}}]);

  sftp.on('REALPATH', (id, file) => name(id, path.resolve('/', file)));
  sftp.on('STAT', (id, file) => fs.stat(file, told(id, info => sftp.attrs(id, attributes(info)))));
  sftp.on('LSTAT', (id, file) => fs.lstat(file, told(id, info => sftp.attrs(id, attributes(info)))));
  sftp.on('FSTAT', (id, handle) => fs.fstat(of(handle).fd, told(id, info => sftp.attrs(id, attributes(info)))));
  sftp.on('OPEN', (id, file, flags, attrs) =>
    fs.open(file, openFlags(flags), attrs.mode || 0o644, told(id, fd => keep(id, {fd}))));
  sftp.on('READ', (id, handle, offset, length) =>
    fs.read(of(handle).fd, Buffer.alloc(length), 0, length, offset, (error, count, data) =>
      error ? done(id)(error) : count ? sftp.data(id, data.slice(0, count)) : sftp.status(id, STATUS_CODE.EOF)));
  sftp.on('WRITE', (id, handle, offset, data) => fs.write(of(handle).fd, data, 0, data.length, offset, done(id)));
  sftp.on('CLOSE', (id, handle) => of(handle).fd ? fs.close(of(handle).fd, done(id)) : done(id)());
  sftp.on('OPENDIR', (id, file) => fs.readdir(file, told(id, names => keep(id, {file, names}))));
  sftp.on('READDIR', (id, handle) => {
    const directory = of(handle);
    const names = directory.names.splice(0, 100);
    if (!names.length) return sftp.status(id, STATUS_CODE.EOF);
    sftp.name(id, names.flatMap(filename => {
      const info = fs.lstatSync(path.join(directory.file, filename), {throwIfNoEntry: false});
      return info ? [{filename, longname: filename, attrs: attributes(info)}] : [];
    }));
  });
  sftp.on('REMOVE', (id, file) => fs.unlink(file, done(id)));
  sftp.on('RMDIR', (id, file) => fs.rmdir(file, done(id)));
  sftp.on('MKDIR', (id, file) => fs.mkdir(file, done(id)));
  sftp.on('end', () => sftp.end());
  sftp.on('RENAME', (id, from, to) => fs.rename(from, to, done(id)));
}

new Server({hostKeys: [fs.readFileSync(hostKey)]}, client => {
  client.on('authentication', asked => asked.method !== 'publickey' || !asked.key.data.equals(known.getPublicSSH())
    || (asked.signature && known.verify(asked.blob, asked.signature, asked.hashAlgo) !== true)
    ? asked.reject(['publickey']) : asked.accept());
  client.on('session', accept => accept().on('sftp', accept => serve(accept())));
  client.on('error', () => {});
}).listen(Number(port), '127.0.0.1');
