// npm ftpd: ftpd.js PORT TOP PASSWORD
const {FtpServer} = require('ftpd');

const [port, top, password] = process.argv.slice(2);
const server = new FtpServer('127.0.0.1', {
  getInitialCwd: () => '/', getRoot: () => top, pasvPortRangeStart: 20000, pasvPortRangeEnd: 29999,
  useWriteFile: false, useReadFile: false, allowUnauthorizedTls: true,
});
server.on('client:connected', connection => {
  connection.on('command:user', (name, good, bad) => name === 'mover' ? good() : bad());
  connection.on('command:pass', (word, good, bad) => word === password ? good('mover') : bad());
});
server.on('error', error => console.log(error));
server.listen(Number(port));
