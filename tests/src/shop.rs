//! The order process of `examples/order` with its services, for the demo and the tests: what runs, and what must add up.
use crate::broker::root;
use crate::process::{Process, command};
use anyhow::{Context, ensure};
use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What each customer has at the beginning, as `payments.py` says.
const OPENING: i64 = 200;

/// The shop: goods, accounts and parcels in a directory, and the address of its payment service.
#[derive(Debug)]
pub struct Shop {
    dir: PathBuf,
    port: u16,
}

/// What was taken, as the shop's journals say it, or as its completed orders do.
#[derive(Debug, Default)]
pub struct Books {
    /// Taken from customers, and not given back.
    pub money: i64,
    /// Taken from the stock and not put back, by article.
    pub goods: BTreeMap<String, i64>,
    /// What is left of it; orders do not say that.
    pub left: BTreeMap<String, i64>,
    /// Instances with a parcel.
    pub parcels: usize,
}

impl Shop {
    /// A shop in an empty directory, with so much of each article.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn open(dir: &Path, stock: &[(&str, i64)]) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let lines: String = stock.iter().map(|(sku, quantity)| format!("add - {sku} {quantity}\n")).collect();
        std::fs::File::create(dir.join("stock"))?.write_all(lines.as_bytes())?;
        // Free now, and hardly given to anybody else before the service takes it.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        Ok(Self { dir: dir.to_owned(), port })
    }

    /// `order.yaml` with this shop's address, for a worker that runs anywhere.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn definition(&self) -> anyhow::Result<String> {
        let example = root().join("examples/order");
        let text = std::fs::read_to_string(example.join("order.yaml"))?;
        let (here, there) = ("127.0.0.1:8090", format!("127.0.0.1:{}", self.port));
        ensure!(
            text.contains(here) && text.contains("examples/order/stock.pl"),
            "order.yaml is not what the demo expects"
        );
        Ok(text
            .replace(here, &there)
            .replace("examples/order/stock.pl", &example.join("stock.pl").display().to_string()))
    }

    /// A worker of the order process.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn worker(&self, environment: &[(String, String)], log: &Path) -> anyhow::Result<Process> {
        let mut worker = command("warren-order", environment);
        worker.arg("run");
        worker.env("ORDER_DIR", &self.dir);
        Process::start(worker, log)
    }

    /// Starts the payment service, and waits until it answers.
    ///
    /// # Errors
    /// It does not.
    pub async fn payments(&self) -> anyhow::Result<Process> {
        let mut service = Command::new("python3");
        service.arg(root().join("examples/order/payments.py")).arg(self.port.to_string()).arg(&self.dir);
        let process = Process::start(service, &self.dir.join("payments.out"))?;
        crate::until("the payment service answers", Duration::from_secs(20), || {
            TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        })
        .await
        .with_context(|| process.log())?;
        Ok(process)
    }

    /// Whether the payment service refuses everything from now on.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn shut(&self, down: bool) -> anyhow::Result<()> {
        let file = self.dir.join("down");
        if down {
            std::fs::write(file, "")?
        } else {
            std::fs::remove_file(file)?
        }
        Ok(())
    }

    /// Requests that the payment service answered with a status.
    #[must_use]
    pub fn requests(&self, status: &str) -> usize {
        let mut log = String::new();
        // It may not have begun.
        let _ = std::fs::File::open(self.dir.join("payments.log")).and_then(|mut file| file.read_to_string(&mut log));
        log.lines().filter(|line| line.split(' ').nth(1) == Some(status)).count()
    }

    /// What money, goods and parcels say.
    ///
    /// # Errors
    /// A journal cannot be read, or contradicts itself.
    pub fn books(&self) -> anyhow::Result<Books> {
        let mut books = Books::default();
        let payments = Connection::open_with_flags(self.dir.join("payments.db"), OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        let number = |sql: &str| payments.query_row(sql, [], |row| row.get::<_, i64>(0));
        books.money = number("SELECT coalesce(sum(amount), 0) FROM charges WHERE NOT refunded")?;
        let missing = number(&format!("SELECT coalesce(sum({OPENING} - balance), 0) FROM accounts"))?;
        ensure!(missing == books.money, "the customers miss {missing}, and {} was taken", books.money);
        for line in std::fs::read_to_string(self.dir.join("stock"))?.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let [what, _, sku, quantity] = fields[..] else { anyhow::bail!("{line:?} is no line of the stock") };
            let quantity: i64 = quantity.parse()?;
            let taken = match what {
                "reserve" => quantity,
                "release" => -quantity,
                _ => 0,
            };
            *books.goods.entry(sku.to_owned()).or_default() += taken;
            *books.left.entry(sku.to_owned()).or_default() += if what == "add" { quantity } else { -taken };
        }
        let parcels = self.dir.join("parcels");
        if parcels.exists() {
            books.parcels = std::fs::read_dir(parcels)?.count();
        }
        Ok(books)
    }
}

impl Books {
    /// Whether what was taken is what these completed orders took, and no more of it than there was.
    #[must_use]
    pub fn add_up(&self, sold: &Self) -> bool {
        let goods = self.goods.iter().filter(|(_, taken)| **taken != 0).eq(&sold.goods);
        let left = self.left.values().all(|left| *left >= 0);
        self.money == sold.money && self.parcels == sold.parcels && goods && left
    }
}

/// What all completed orders together took.
///
/// # Errors
/// One has not the shape that [`order`] gives it.
pub fn sold<'a>(completed: impl IntoIterator<Item = &'a Value>) -> anyhow::Result<Books> {
    let mut books = Books::default();
    for data in completed {
        let input = &data["input"];
        let quantity = input["quantity"].as_i64().context("a quantity")?;
        books.money += quantity * input["price"].as_i64().context("a price")?;
        *books.goods.entry(input["sku"].as_str().context("an article")?.to_owned()).or_default() += quantity;
        books.parcels += 1;
    }
    Ok(books)
}

/// The articles, and what they cost.
pub const ARTICLES: [(&str, i64); 4] = [("book", 15), ("lamp", 40), ("chair", 60), ("pen", 3)];

/// The n-th order: one to three of an article, for one of so many customers; one in twenty to where nobody delivers.
#[must_use]
pub fn order(n: usize, customers: usize) -> Value {
    let (sku, price) = ARTICLES[n % ARTICLES.len()];
    let address = if n % 20 == 13 { "nowhere".into() } else { format!("{} Main Street", n % 97 + 1) };
    let data = json!({"sku": sku, "price": price, "quantity": n % 3 + 1, "customer": format!("customer-{}", n % customers), "address": address});
    crate::event(&format!("order-{n}"), "order.placed", &format!("customer-{}", n % customers), data)
}
