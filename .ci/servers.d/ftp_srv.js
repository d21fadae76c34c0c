// npm ftp-srv: ftp_srv.js PORT TOP PASSWORD
const {FtpSrv} = require('ftp-srv');

const [port, top, password] = process.argv.slice(2);
const server = new FtpSrv({url: `ftp://127.0.0.1:${port}`, pasv_url: '127.0.0.1'});
server.on('login', (login, resolve, reject) =>
  login.username === 'mover' && login.password === password ? resolve({root: top}) : reject(new Error('no')));
server.listen();
